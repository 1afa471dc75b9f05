"""What the commands of `lmc log` and `lmc plan log` do, one file a command."""
