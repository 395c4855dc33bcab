"""From a config to a running engine: sizes, pools of workers, wiring."""
