"""What is run: the frozen base, and private copies of its modules with tensors bound in them."""
