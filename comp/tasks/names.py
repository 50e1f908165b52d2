"""The names of the tasks; no torch in here, so that a command line can check them at once."""

TASKS = ("vqa", "nlvr2", "retrieval", "instruct")
