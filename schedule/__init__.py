"""Pipeline schedules across ranks: generated, checked, lowered to sends and receives, simulated and drawn."""
