# Writes km.json: Kaplan-Meier, Nelson-Aalen, restricted means and log-rank tests of R's survival package on its own small data.
# Rscript tests/parity/r/make_km.R tests/parity/r/km.json
library(survival)
library(jsonlite)

curve <- function(fit) list(
  time = fit$time, n_risk = fit$n.risk, n_event = fit$n.event, n_censor = fit$n.censor, surv = fit$surv,
  std_err = fit$std.err, cumhaz = fit$cumhaz, std_chaz = fit$std.chaz, lower = fit$lower, upper = fit$upper
)

group_of <- function(d, interval, horizon) {
  one <- lapply(sort(unique(d$group)), function(g) {
    fit <- survfit(Surv(time, event) ~ 1, data = d[d$group == g, ], conf.type = interval)
    q <- quantile(fit, 0.5)
    mean <- summary(fit, rmean = horizon)$table
    c(curve(fit), list(
      median = unname(q$quantile), median_lower = unname(q$lower), median_upper = unname(q$upper),
      rmst = unname(mean["rmean"]), rmst_se = unname(mean["se(rmean)"])
    ))
  })
  one
}

test <- function(formula, d, rho) {
  fit <- survdiff(formula, data = d, rho = rho)
  obs <- if (is.matrix(fit$obs)) rowSums(fit$obs) else fit$obs
  exp <- if (is.matrix(fit$exp)) rowSums(fit$exp) else fit$exp
  df <- length(obs) - 1
  list(observed = unname(obs), expected = unname(exp), variance = unname(fit$var), chi2 = unname(fit$chisq), df = df,
       p = pchisq(unname(fit$chisq), df, lower.tail = FALSE))
}

data_of <- list(
  lung = { d <- lung[!is.na(lung$ph.ecog) & lung$ph.ecog < 3, ]
    data.frame(time = d$time, event = d$status - 1, group = d$ph.ecog, stratum = d$sex - 1) },
  veteran = data.frame(time = veteran$time, event = veteran$status, group = as.integer(veteran$celltype) - 1,
                       stratum = veteran$trt - 1),
  ovarian = data.frame(time = ovarian$futime, event = ovarian$fustat, group = ovarian$rx - 1,
                       stratum = ovarian$resid.ds - 1)
)
horizon <- c(lung = 600, veteran = 300, ovarian = 700)

out <- lapply(names(data_of), function(name) {
  d <- data_of[[name]]
  list(
    data = as.list(d), horizon = unname(horizon[name]),
    intervals = sapply(c("log-log", "log", "plain"), function(i) group_of(d, i, horizon[name]), simplify = FALSE),
    survdiff = list(
      log_rank = test(Surv(time, event) ~ group, d, 0), peto = test(Surv(time, event) ~ group, d, 1),
      stratified = test(Surv(time, event) ~ group + strata(stratum), d, 0),
      stratified_peto = test(Surv(time, event) ~ group + strata(stratum), d, 1)
    )
  )
})
names(out) <- names(data_of)
out$package <- paste("survival", packageVersion("survival"))
file <- commandArgs(trailingOnly = TRUE)[1]
writeLines(toJSON(out, digits = 17, auto_unbox = TRUE, na = "null"), file)
