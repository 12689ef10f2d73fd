"""TCGA as UCSC Xena's GDC hub hands it out, turned into site folders."""
