"""The Responses API: a chat whose turns are items, and whose conversation the server may keep."""
