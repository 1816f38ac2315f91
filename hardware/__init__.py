"""What a chip can do, read from `devices/*.toml`. Every figure there says where it is from."""
