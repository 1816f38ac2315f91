"""What the pass overlap is made of: components of a layer, orders on two streams, functions merged."""
