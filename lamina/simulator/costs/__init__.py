"""From models, devices and links to the seconds of a batch."""
