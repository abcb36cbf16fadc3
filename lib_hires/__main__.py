"""`python -m lib_hires`: see lib_hires/cli.py."""

import sys


def main() -> int:
    """Run the command line; errors that are meant for the user become one line and status 2."""
    from .cli import run
    from .config.errors import HiresError

    try:
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
    except KeyboardInterrupt:
        print("Hires Lab: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
