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

# unpack PACKAGE LIBRARY...: PACKAGE below .cache/, so that the host gets no server that runs. Its
# libraries become packages of the host, since they start nothing.
unpack() {
    package_to_unpack=$1
    shift
    need_root "$package_to_unpack"
    install_packages "$@"
    update_once
    # In a folder of its own, so that what failed half-way is not taken for done the next time.
    part=.cache/$package_to_unpack.part
    rm -rf "$part"
    mkdir -p "$part"
    (
        cd "$part"
        # As root: the sandbox user of apt may not write here, which is no more than a warning.
        apt-get -q -o APT::Sandbox::User=root download "$package_to_unpack"
        dpkg -x "$package_to_unpack"_*.deb .
        rm "$package_to_unpack"_*.deb
    )
    rm -rf ".cache/$package_to_unpack"
    mv "$part" ".cache/$package_to_unpack"
}
