"""What is built, held equal and measured, for each kind of method: one file a kind."""
