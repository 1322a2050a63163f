"""Shows the figures. units.py and tables.py (text), plots.py (pictures), results.py (JSON
files), documents.py (the places in the documents that the benchmark's commands rewrite).
"""
