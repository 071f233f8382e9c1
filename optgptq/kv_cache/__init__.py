"""Keys and values in few bits: what a cache holds, how vectors become codes, and where the bytes of a page lie."""
