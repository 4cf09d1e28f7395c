"""The error whose message is written for the person at the keyboard."""


class MemFlowError(ValueError):
    """Something the user gave, or something a run met, that can be said in one line.

    The command line prints the message and ends with exit code 2; everything else is a defect and keeps its traceback.
    """
