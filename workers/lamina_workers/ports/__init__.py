"""The seam: messages to one holder, in this process or over a channel, and their timing."""
