"""An attention worker as a process for engines elsewhere: leases, sessions, its loop."""
