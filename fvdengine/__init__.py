# SPDX-License-Identifier: Apache-2.0
"""The FVD format and the operations on images; see FORMAT.md in this folder.

Importing the package loads no operation and no native code: import the module you need.
"""
