"""What numbers become: formats and casts, quantisation, and the tensor core's accumulator, all bit-exact in NumPy."""
