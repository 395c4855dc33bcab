"""Finds a KV policy for each head of a model: scores of heads, a search for windows, a choice by measured quality."""
