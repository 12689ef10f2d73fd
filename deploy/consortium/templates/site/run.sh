#!/bin/sh
# Runs the node of this site; the site's folder is the one above this script's.
set -eu
site=$(cd "$(dirname "$0")/.." && pwd)
exec oncofed site start "$site" "$@"
