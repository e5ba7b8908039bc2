# SPDX-License-Identifier: Apache-2.0
"""What several kinds of tests share: servers, clients, models and outside programs."""
