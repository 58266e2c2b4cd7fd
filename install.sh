#!/bin/sh
# Compiles kodemachine into one file in a folder of programs, and pins it to one Python.
set -eu

usage() {
  cat <<'EOF'
usage: install.sh [--prefix DIR] [--uninstall]

Installs kodemachine to ~/bin for Python 3.9 or newer. Safe to run again.

  --prefix DIR  install to DIR/bin instead
  --uninstall   remove the program; configuration, state and machines stay
  -h, --help    show this text

environment:
  PYTHON        the interpreter to try first
  DESTDIR       a staging folder, put before the destination
EOF
}

say() { printf '%s\n' "$*"; }

die() {
  printf 'install.sh: %s\n' "$2" >&2
  exit "$1"
}

absolute() {
  case $1 in
    /*) say "$1" ;;
    '~'/*) say "$HOME/${1#??}" ;;
    *) say "$PWD/$1" ;;
  esac
}

# Interpreters, best first: a path that outlives an upgrade of Python comes before one that does not.
candidates() {
  set --
  [ -z "${PYTHON:-}" ] || set -- "$(absolute "$(command -v "$PYTHON")")"
  # Without the command line tools, Apple's /usr/bin/python3 opens a dialog instead of running.
  # Only xcode-select finds out without that, and it names the real one.
  system=$(uname)
  ! tools=$(xcode-select -p 2>/dev/null) || set -- "$@" "$tools/usr/bin/python3"
  set -- "$@" /opt/homebrew/bin/python3 /usr/local/bin/python3
  set -f
  IFS=:
  for dir in $PATH; do
    # The project that a virtual environment belongs to may be gone tomorrow.
    [ -e "$dir/../pyvenv.cfg" ] || set -- "$@" "$dir/python3"
  done
  for path do
    case $system:$path in
      Darwin:/usr/bin/python3) ;;
      *:/*) if [ -f "$path" ] && [ -x "$path" ]; then say "$path"; fi ;;
    esac
  done | awk '!seen[$0]++'
}

# Sets python and python_version, or ends the installation.
find_python() {
  ask='import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 9))'
  passed=
  [ -z "${PYTHON:-}" ] || command -v "$PYTHON" >/dev/null || die 1 "PYTHON=$PYTHON: there is no such program"
  while IFS= read -r python; do
    [ -n "$python" ] || continue
    if python_version=$("$python" -IS -c "$ask" 2>/dev/null </dev/null); then
      # A pyenv shim is a script itself, and macOS runs no script behind "#!".
      [ "$(head -c 2 "$python")" != '#!' ] || python=$("$python" -IS -c 'import sys; print(sys.executable)')
      return
    fi
    passed="$passed${passed:+, }$python (${python_version:-unusable})"
  done <<EOF
$(candidates)
EOF
  die 1 "no Python 3.9 or newer, found: ${passed:-none}; install one (on macOS: xcode-select --install)\
 or name it: PYTHON=/path/to/python3"
}

# What follows "#!" in the installed program.
interpreter() {
  # The kernel splits that line at blanks and may cut it after 127 bytes.
  if say "$python" | LC_ALL=C grep -Eq '[[:blank:]]|.{121}'; then
    say '/usr/bin/env python3'
  else
    say "$python -IS"
  fi
}

# Writes $new: a zip application of the compiled program, since compiling it again would double the time of each run,
# and of its source, which any other Python runs. Not compressed, so the source can be read, and searched, in the file.
build() {
  "$python" -IS - "$source" "$new" "$target" "$bin" "$(interpreter)" <<'EOF'
import contextlib, py_compile, sys, zipfile
source, new, target, folder, interpreter = sys.argv[1:]
unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
py_compile.compile(source, new, folder + "/kodemachine/__main__.py", doraise=True, invalidation_mode=unchecked)
with open(new, "rb") as compiled, open(source, "rb") as text:
    code, program = compiled.read(), text.read()
# Before Python 3.11 no two compilations are alike. The first 16 bytes have the version and the source's hash.
with contextlib.suppress(OSError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(target) as installed:
    old = installed.read("__main__.pyc")
    code = old if old[:16] == code[:16] else code
with open(new, "wb") as file:
    file.write(f"#!{interpreter}\n".encode())
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in ("__main__.pyc", code), ("__main__.py", program):
            archive.writestr(zipfile.ZipInfo(name), content)        # whose time is always the same
EOF
}

# The version of a kodemachine, nothing for any other file.
version_of() {
  if [ -f "$1" ] && LC_ALL=C grep -q kodemachine "$1"; then
    LC_ALL=C sed -n 's/^__version__[^"]*"\([^"]*\)".*/\1/p' "$1"
  fi
}

install() {
  release=$(version_of "$source")
  [ -n "$release" ] || die 1 "there is no kodemachine.py beside install.sh: $source"
  find_python
  [ -z "$passed" ] || say "passed over: $passed"
  folder=${target%/*}
  { mkdir -p "$folder" 2>/dev/null && [ -w "$folder" ]; } ||
    die 1 "$folder cannot be written to; choose another --prefix"
  new=$folder/.kodemachine.$$
  trap 'rm -f "$new"*' EXIT
  trap 'exit 1' HUP INT TERM PIPE
  build
  chmod 755 "$new"
  if cmp -s "$new" "$target" && [ -x "$target" ]; then
    say "kodemachine $release is already up to date: $target"
  else
    mv -f "$new" "$target"
    change="${installed:+updated kodemachine $installed -> $release}"
    say "${change:-installed kodemachine $release}: $target (Python $python_version, $python)"
  fi
  # A staging folder says nothing about the machine that the program will run on.
  if [ -z "${DESTDIR:-}" ]; then
    note_path
    note_tab
    note_missing
  fi
}

# The file below HOME in which the shell in use looks at its start.
startup_file() {
  case $(uname):${SHELL:-} in
    *:*/zsh) say .zshrc ;;
    *:*/fish) say .config/fish/config.fish ;;
    # Terminals on macOS start login shells, which read no .bashrc.
    Darwin:*/bash) say .bash_profile ;;
    *:*/bash) say .bashrc ;;
    *) say .profile ;;
  esac
}

note_path() {
  case :$PATH: in *":$bin:"* | *":$bin/:"*) return ;; esac
  line="export PATH=\"$bin:\$PATH\""
  case ${SHELL:-} in */fish) line="fish_add_path \"$bin\"" ;; esac
  say "note: $bin is not on PATH; add this line to ~/$(startup_file):"
  say "  $line"
}

note_tab() {
  shell=${SHELL:-}
  shell=${shell##*/}
  case $shell in
    zsh | bash) line="eval \"\$(kodemachine completion $shell)\"" ;;
    fish) line='kodemachine completion fish | source' ;;
    *) return 0 ;;
  esac
  file=$(startup_file)
  if ! grep -qs 'kodemachine completion' "$HOME/$file"; then
    say "note: for completion by Tab add this line to ~/$file:"
    say "  $line"
  fi
}

note_missing() {
  command -v ssh >/dev/null || say 'note: ssh is missing; install the OpenSSH client'
  app=Applications/UTM.app/Contents/MacOS/utmctl
  if ! command -v utmctl >/dev/null && [ ! -x "/$app" ] && [ ! -x "$HOME/$app" ]; then
    say 'note: UTM is missing; brew install --cask utm'
  fi
}

stays() { [ ! -e "$1" ] || say "$1 stays ($2)"; }

uninstall() {
  if [ -n "$installed" ]; then
    rm -f "$target"
    say "removed kodemachine $installed: $target"
  else
    say "kodemachine is not installed: $target"
  fi
  say 'the machines in UTM stay'
  stays "${XDG_CONFIG_HOME:-$HOME/.config}/kodemachine" configuration
  stays "${XDG_STATE_HOME:-$HOME/.local/state}/kodemachine" state
  stays "${XDG_CACHE_HOME:-$HOME/.cache}/kodemachine" 'downloaded images'
  for file in .ssh/config .zshrc .bashrc .bash_profile .profile .config/fish/config.fish; do
    ! grep -qs kodemachine "$HOME/$file" || say "$HOME/$file stays (a line in it names kodemachine)"
  done
}

main() {
  action=install prefix=${HOME:-}
  while [ $# -gt 0 ]; do
    case $1 in
      --prefix)
        case ${2:--} in -*) die 2 '--prefix needs a folder' ;; esac
        prefix=$2
        shift
        ;;
      --prefix=?*) prefix=${1#*=} ;;
      --uninstall) action=uninstall ;;
      -h | --help)
        usage
        exit
        ;;
      *) die 2 "unknown option: $1 (--help lists them)" ;;
    esac
    shift
  done

  [ -n "$prefix" ] || die 2 'HOME is not set: name a folder with --prefix'
  : "${HOME:=/}"
  source=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)/kodemachine.py
  prefix=$(absolute "$prefix")
  bin=${prefix%/}/bin
  target=${DESTDIR:-}$bin/kodemachine
  installed=$(version_of "$target")
  if [ -z "$installed" ] && { [ -e "$target" ] || [ -L "$target" ]; }; then
    die 1 "$target is not kodemachine; move it away or choose another --prefix"
  fi
  "$action"
}

main "$@"
