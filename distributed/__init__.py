"""Programs on many ranks: what ranks ask of each other (`world`), all in one process (`local`), or a process each (`torch_world`)."""
