"""What the commands show: one module per thing that is shown."""
