"""What everything stands on: nouns, files, settings, a step on disk, and who does the work."""
