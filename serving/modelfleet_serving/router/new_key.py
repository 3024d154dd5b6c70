"""``modelfleet key NAME``: makes an API key. The key is shown once; the file holds its hash."""

from __future__ import annotations

import argparse
import sys

from modelfleet_serving.router.tenants import generate_key, hash_key


def main(arguments: list[str] | None = None) -> int:
    """Print a new key to the terminal, and the entry for the keys file to standard output."""
    parser = argparse.ArgumentParser(prog="modelfleet key", description=__doc__)
    parser.add_argument("name", help="tenant that the key is for")
    parser.add_argument(
        "--models", nargs="*", default=["*"], help="models it may use: *, MODEL, MODEL:VARIANT"
    )
    options = parser.parse_args(arguments)
    key = generate_key()
    sys.stderr.write(f"API key of {options.name}, shown this once: {key}\n")
    models = ", ".join(f'"{model}"' for model in options.models)
    sys.stdout.write(f'- {{name: "{options.name}", hash: "{hash_key(key)}", models: [{models}]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
