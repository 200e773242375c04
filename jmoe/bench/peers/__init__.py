"""What jmoe is measured beside, on PyTorch tensors; none of it is installed with jmoe."""
