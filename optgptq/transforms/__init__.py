"""Changes of a model that leave what it computes as it is and make its weights easier to quantize."""
