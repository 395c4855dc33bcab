"""What a mix of machines costs and yields. Knows no running engine, and measures nothing."""
