"""One page about a finished run: `ssimkd report`."""
