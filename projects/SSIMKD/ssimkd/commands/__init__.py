"""What `ssimkd <command>` runs, one file each."""
