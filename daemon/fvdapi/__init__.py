# SPDX-License-Identifier: Apache-2.0
"""The control API of fvd as types: what fvdd and its clients say to each other.

Used by both sides and depending on neither: `models` (every request and answer), `errors` (the
table of codes), `client` (calls over the Unix socket). Nothing is imported here, so that the
daemon does not pay for the client's HTTP library.
"""
