"""What `shard-experts` is made of: layouts, the body of one rank's function, and a rule for each op."""
