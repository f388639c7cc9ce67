# Functions for scripts that install Debian packages, as root. What is there already is left alone.
# To be sourced, in the checkout, by a script that runs with `set -eu`.
# shellcheck shell=sh

updated=no

installed() {
    [ "$(dpkg-query -W -f '${Status}' "$1" 2>/dev/null)" = 'install ok installed' ]
}

need_root() {
    if [ "$(id -u)" != 0 ]; then
        echo "$0: missing: $*; run this as root" >&2
        exit 1
    fi
}

update_once() {
    [ "$updated" = yes ] || apt-get -q update
    updated=yes
}

# install PACKAGE...: those that are missing.
install_packages() {
    missing=
    for package in "$@"; do
        installed "$package" || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    need_root "$missing"
    update_once
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install $missing
}

# unpack FOLDER PACKAGE...: below .cache/, so that the host gets no service that runs.
unpack() {
    folder=.cache/$1
    shift
    need_root "$@"
    update_once
    # In a folder of its own, so that what failed half-way is not taken for done the next time.
    rm -rf "$folder.part"
    mkdir -p "$folder.part"
    (
        cd "$folder.part"
        # As root: the sandbox user of apt may not write here, which is no more than a warning.
        apt-get -q -o APT::Sandbox::User=root download "$@"
        for package in *.deb; do
            dpkg -x "$package" .
            rm "$package"
        done
    )
    rm -rf "$folder"
    mv "$folder.part" "$folder"
}
