"""What happened in training: records, the log on disk, the logger, replay."""
