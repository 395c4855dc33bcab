"""An engine as a Ray actor."""
