"""Where the files of a repository are stored: a small protocol, with a folder and memory as implementations."""
