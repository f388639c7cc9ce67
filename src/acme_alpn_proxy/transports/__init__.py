"""Sockets: lean ones for Linux, and Twisted's."""
