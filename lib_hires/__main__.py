"""`python -m lib_hires`: see lib_hires/cli.py."""

import os
import sys


def main() -> int:
    """Run the command line; errors that are meant for the user become one line and status 2."""
    from .config.errors import HiresError

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a console that cannot show a name must not end the run
    try:
        from .cli import run

        return run(sys.argv[1:])
    except HiresError as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"Hires Lab: the package '{error.name}' is missing. Install with: pip install -e .[standalone]",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # who reads the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        from .cli import INTERRUPTED

        print("Hires Lab: interrupted.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
