"""`python -m clipcli`."""

from clipcli.cli.main import main

if __name__ == "__main__":
    main()
