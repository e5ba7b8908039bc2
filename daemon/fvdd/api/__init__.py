# SPDX-License-Identifier: Apache-2.0
"""Routes of the control API: validate, call one domain object, render."""
