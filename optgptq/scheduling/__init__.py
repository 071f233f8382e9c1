"""What runs when: requests, pages and steps of the runtime. No tensor in here."""
