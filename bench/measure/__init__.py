"""Takes the measurements. case.py measures all variants of a case, with the help of the others:
clock.py and turns.py (time), memory.py, launches.py, oracle.py (errors), machine.py (the rates that
the machine reaches, and the floor that follows from them).
"""
