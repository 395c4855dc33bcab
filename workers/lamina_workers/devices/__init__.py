"""Devices by name, their memory, and staging between host and device."""
