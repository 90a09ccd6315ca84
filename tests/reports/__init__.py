"""Tests of focus_compile.reports, and of what messages say."""
