"""The supervisor, its child processes, and the messages between them.

`Supervisor` (`supervisor.py`) starts an HTTP process (`http_main.py`) and, for each loaded model, an engine process
(`engine_main.py`); `child_protocol.py` has all messages on the pipes between them. Requests and tokens do not pass the
supervisor: the HTTP process reaches each engine by a socket (`engine_link.py`). `attention_role.py` has the attention
workers that the supervisor starts, and those of machines that join.
"""
