"""The commands of `lmc`, by group; what they do is imported when they run."""
