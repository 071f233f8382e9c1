"""Inner loops in C++, for processors; each has a twin in torch that defines it."""
