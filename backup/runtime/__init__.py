"""What long work needs: threads, signals, timeouts, a rate limit, progress, and I/O past the page cache."""
