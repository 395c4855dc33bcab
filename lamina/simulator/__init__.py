"""What a mix of machines costs and yields. Pure."""
