"""What outlives an engine: requests and their tokens on disk, and how they are taken up again."""
