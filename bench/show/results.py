"""JSON files of figures: written whole or not at all, and read back with one line for an error."""

import json


def save(report, path):
    """Writes a report to the path, if there is one."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(path)


def load(options, parser):
    """The report that `--load` names, or None without one; of the device that `--device` names."""
    if not options.load:
        return None
    try:
        report = json.loads(options.load.read_text())
        device = "cpu" if report["device"] == "cpu" else "cuda"
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--load got {error}, wanted a file of --json")
    if device != options.device or report.get("quick"):
        parser.error(f"--load got figures of {device}, wanted measured ones of {options.device}")
    return report
